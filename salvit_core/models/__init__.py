"""What a network computes in the clear. Imports torch and nothing of ours outside this room."""
