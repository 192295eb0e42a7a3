"""Cameras of a capture: checked against its depth, refined, and found where there are none.

The flows run the stage `find_cameras`; the other modules are its parts.
"""
