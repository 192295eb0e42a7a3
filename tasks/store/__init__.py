"""The store: files and buckets, the results of stages, what of them may be removed, and claims on uploads.

The lowest package: it imports only tasks.settings and tasks.errors, and every other package may import it.
"""
