"""The weights that the engines load: the list of their pins, their download, and their folder on this machine.

It may import tasks.geometry and what lies below it; tasks.inference and the packages above may import it.
"""
