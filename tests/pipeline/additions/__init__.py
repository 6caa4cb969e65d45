"""Made-up additions and their tests (``check_*``); ``test_what_it_costs_to_add.py`` puts them into a copy of the repository."""
