"""`actstore bench all`: the one place where speed is known.

Each module measures one group of rows; `rounds` times them, `table` and `picture` show them.
"""
