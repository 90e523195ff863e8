"""Array functions that are worth writing by hand, each with its slow oracle beside it."""
