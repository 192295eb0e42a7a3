"""The inference of TRELLIS-VGGT in plain PyTorch: one module a network, their loader, and the pipeline that runs them.

The names of parameters are those of the published files. Only the model's process and tests import it: it needs torch.
Notation: V views, T tokens (occupied cells of a 32^3 grid), N voxels (of a 64^3 grid), C channels.
"""
