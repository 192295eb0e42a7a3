"""The `trellis` engine: TRELLIS-VGGT (ReconViaGen) on CUDA, with its model in a process of its own (`process`).

Imports `tasks.weights` and rooms below it, never torch or upstream's packages. `tasks.inference` imports the engine,
`tasks.doctor` and the command `doctor` its `model_process`.
"""
