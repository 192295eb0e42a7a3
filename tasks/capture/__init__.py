"""Captures: which files make one, their cameras, the decoded views, and the checks that one can be reconstructed.

Holds the stages stage_capture and validate_capture. Every room above may import it; it imports tasks.stage and below.
"""
