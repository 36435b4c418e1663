"""Peers: what a user would run instead, one file each, written as published code writes it.

Module by module through ``torch.linalg`` in the factors' own dtype, on the clients' tensors, unless
a peer's text says otherwise.
"""
