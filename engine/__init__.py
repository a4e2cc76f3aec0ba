"""Keeps a run alive: processes, files, images, options. Knows nothing of SlotCon or of any
configuration.
"""
