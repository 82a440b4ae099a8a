"""How fast training is: steps against a dense reference and their floor, the cache against memory."""
