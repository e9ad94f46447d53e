"""What others do, in the same harness on the same captions."""
