"""Everything a first run needs offline: a tiny random checkpoint and a handful of examples."""
