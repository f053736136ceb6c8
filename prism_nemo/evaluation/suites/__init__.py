"""What is asked: benchmarks, question files, procedural and long-context questions."""
