"""The gallery as an index that is built, searched and described."""
