"""A stand-in for Miniconda and its channel, where neither can be fetched.

It is no mock of the task but another conda. The packages are real .conda archives, and what solves,
downloads and links them is py-rattler, a library of conda's own organisation. The command line, the
files and the messages are those that conda's documentation gives for conda 24; what is not built
here fails as a usage error. python is Debian's own 3.11 moved into a prefix, so its environments
run where Debian 12's libraries are (libssl3, libffi8, libsqlite3-0 …).
"""
