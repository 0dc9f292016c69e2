"""Programs that measure; each writes JSON and a table. Committed measurements are in results/."""
