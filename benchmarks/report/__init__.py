"""What is read from result files, and nothing measured: goals, pages, charts, what became slower."""
