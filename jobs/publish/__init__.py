"""Publishing: which result readers get, and what it had to prove before."""
