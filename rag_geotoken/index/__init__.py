"""The gallery is an index that is built, searched and described here."""
