"""Fetches weight sets into a store: from hubs, plain addresses, and what a browser downloaded.

The list of a repository, its addresses and the token come from huggingface_hub. The bytes do not:
its own download verifies sizes only, keeps its partial files to itself and knows one source. Here
a partial file belongs to a content, whichever source it came from, is hashed while it grows, and
gets the file's name when its hash is right.
"""
