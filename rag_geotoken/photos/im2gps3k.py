"""The source `im2gps3k:DIR` is a test set of the papers, described in :mod:`.benchmarks`."""

from functools import partial

from rag_geotoken.photos import benchmarks

read = partial(benchmarks.read, "im2gps3k")
