"""Late interaction on a GPU, in Triton: the kernels.

Of two sides one is held and the other is streamed. A program holds the rows of some sets in one tile, several short sets
side by side or one long set chunk by chunk, and walks through the tokens of one set of the other side, or of a few. Which
of x and y is held is the host's choice, so that one kernel serves both directions.

`max_sweep` (forward of a maximum, and `project_max`) finds maxima and where they are; `gather_sum` (its backward) sums the
chosen rows. `soft_forward` and `soft_backward` do the same for a soft maximum, whose gradient touches all pairs.
`triton_*.py` beside this folder launch them.
"""
