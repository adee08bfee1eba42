"""The functions of `stock`, several times cheaper and right where trained networks need them: a table of gates.

What differs from stock, and where it comes from:

- The server knows the weights, so a product with a weight needs one message of the client, x1 - r, and one product at
  each party; W - B is opened once per session (in the spirit of Delphi, Mishra et al., 2020, Section 4, and of
  MiniONN, Liu et al., 2017). An activation is opened masked once and used for all its monomials.
- Comparisons open 64 bits for the value and about 7 per knot: the masked value's digits are looked up in secret truth
  tables (Ishai et al., 2013, one-time truth tables) and joined by products of several bits at once
  (Damgard et al., 2006; ABY2.0, Patra et al., 2021, Section 3.2, for products of many inputs in one round).
- Everything curved is a piecewise polynomial: knots and coefficients are public, the segment is secret.
- Reciprocals and inverse roots scale their input to [1, 2) by a secret power of two and then evaluate one quadratic per
  quarter octave: no iteration, no starting value, a domain of many octaves.
- Inverses of matrices are iterations at 24 fractional bits whose products all end in an exact truncation; a matrix that
  is in several products is opened masked once.
- Sums are normalised after the product with the values; max-pooling is separable and comes before its ReLU;
  LayerNorm's scale and shift move into the linear maps that read it.
- A step of an LSTM takes seven rounds (`gates.lstm`): a curve without digits, products that truncate their factors. A
  recurrence that is linear in its state takes log2 N in all.
- Scales are bookkeeping: each share knows its fractional bits, so that powers of two cost nothing.
- Openings that need nothing of each other travel together (`arithmetic.schedule`): of CCT-7/3x1 with SAL-ViT B=3 that
  makes 247 rounds of 276.

Letters in costs: n elements of the value, J knots, k digits, p degree; a word is 64 bits, and words are counted as
those a party sends and receives, halved, like the bytes in a record. A round is one message or one exchange.

The model. Two parties hold additive shares in Z_2^64 and speak over a `transport.Channel`; a dealer hands them
correlated randomness (`arithmetic.randomness`). The adversary is semi-honest and static: it reads what one of the three
sees, and which one is settled before. In the proof the dealer is an ideal functionality (the hybrid model), for which a
third process stands that colludes with nobody and whose streams AES-128 makes; under provider "TFP" it is the server,
which could unmask everything: fit for measuring only. Architecture, shapes, bits, and the time it takes are public.

Each gate says what it realises, as its `Functionality`: Inputs and Output, of the values that shares add up to; what is
Opened, and to whom; what the Simulator needs to make a party's messages; and its Failure. Every word that is opened is
under a mask that covers nothing else and that whoever reads the word does not know, so that a simulator draws it
uniformly and needs no secret. The functionality takes the corrupted party's share of the output to be what these words
make it, and gives the other party the rest. So gates compose, one after the other (Canetti, 2000); side by side too, as
a word under a fresh mask is uniform whatever else is known, and what shares a message was fixed before any value was.
Of a network nothing is opened but its `answer`, to the client, and W - B for each weight W, once per session or
reserve.

Rounding. What loses t bits, truncated locally or exactly, becomes floor(y / 2^t), or one more with the probability of
what is cut off: right on average. The coin is in the words that the parties hold or open, not drawn apart, which no
simulator could match; so it belongs to the functionality, and the answer is a function of the inputs and of all coins.

Failure is the probability that a number comes out wrong by 2^(64-t), as only a local truncation can (`Share.to`); that
is far beyond `LIMIT`, and the inference is lost. It is given per number that a gate truncates locally, at 13 bits: a
power of two above the mean in the paper's networks with weights as wide as trained ones, and in a trained one; of a
gate that they lack, in those that have it.

For CCT-7/3x1 with SAL-ViT B=3 the gates' numbers add up to 3.3e-4 per inference, over 7.0 million numbers; by the
values themselves it is 5.5e-5, a third of it L2Q's. It is four times as much with every bit more. These are of random
weights; of a trained CCT-7/3x1 it is 1.4e-4. Another lost 3 of 512 answers: three quarters of its 1e-3 were L2Q's
squares, which have been truncated exactly since.
"""

from .protocol import PROTOCOL

__all__ = ["PROTOCOL"]
