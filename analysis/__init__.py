"""What is made of runs and results afterwards: result files, comparison, labels, judges, report, curves, plan."""
