"""The process of the TRELLIS-VGGT model: all code that imports torch and upstream's `trellis`.

It runs in another Python, in which this project need not be installed: it imports only numpy, Pillow, upstream's
packages and its own modules. Of this project, `tasks.inference.trellis.model_process` imports `channel`; nothing else.
"""
