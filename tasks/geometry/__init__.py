"""Geometry as arrays in, arrays out: depth and noise, mesh repair, hole filling, texture, render, registration.

Knows no stage, no store and no Prefect. Inference and every room above it may import it; it imports tasks.capture's
views, cameras and masks only.
"""
