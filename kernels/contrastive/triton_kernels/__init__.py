"""The core on a GPU, in Triton: the kernels, and what their host side needs.

`reduce_tiles` (forward) multiplies a tile of S and reduces it along its rows and its columns, `merge_partials` joins
the tiles. `weigh_tiles` (backward) multiplies the tile again and writes G = d objective / dS of it, and `add_product`
multiplies G by the features of the other side. `triton_forward.py` and `triton_backward.py` beside this folder launch
them.

Scores are kept in base 2, S log2(e): the exponentials and logarithms of the hardware have that base. Where the order of
scores is the result, in hinges and the largest, they are S itself: what is equal there stays equal.
"""
