"""What is made of runs and results afterwards. `python -m analysis --help` lists the commands."""
