"""What measuring needs: shapes, clocks, bytes, a run and its result file."""
