"""This source, ``yfcc4k:DIR``, is one of the two test sets in :mod:`.benchmarks`."""

from functools import partial

from rag_geotoken.photos import benchmarks

read = partial(benchmarks.read, "yfcc4k")
