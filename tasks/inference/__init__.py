"""From the views of a capture to raw geometry: the engines, the registry that chooses one, and the stage `infer`.

One engine a folder: `fusion` (CPU) and `trellis` (CUDA). Imports `tasks.weights` and rooms below it; `tasks.mesh`,
`tasks.dataset`, `tasks.doctor`, `tasks.report` and the flows import it.
"""
