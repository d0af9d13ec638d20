"""A check that cannot be made from here."""


class NotChecked(Exception):
    """Why not, in a few words."""
