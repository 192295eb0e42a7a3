"""From raw geometry to the published asset: the stages export_glb, convert_formats, validate_mesh and publish.

Imports `tasks.inference`, `tasks.report`, `tasks.artifacts` and rooms below them; `tasks.dataset` and the flows import
it.
"""
