"""Networks in few bits, after Trio-ViT (arXiv 2405.03882), and a model of the machine that computes them."""
