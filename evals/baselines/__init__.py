"""Published methods as baselines, in the same harness on the same captions."""
