"""The CPU engine: posed RGB-D views fused into one surface.

A part of tasks.inference, whose registry imports `fusion_engine`; it imports tasks.geometry and rooms below.
"""
