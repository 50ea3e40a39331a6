"""The program that resumes a run."""
