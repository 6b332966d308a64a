"""Model and adapter: families, plan, roles, loading; `families.py` has a record for each family."""
