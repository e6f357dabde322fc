"""Token merging on a GPU, in Triton: the kernels.

A program works on one sample. `partner_sweep` and `energy_sweep` hold some of its tokens in one tile, walk through all that
these may meet, and keep of each product no more than its row's maximum, or sum. `combine_rows` (merge) and `spread_rows`
(unmerge; each is the other's backward) own some rows of what they write and gather what goes there.
`triton_similarity.py` and `triton_combine.py` beside this folder launch them.
"""
