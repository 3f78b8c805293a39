"""Migration: apply a plan, under a limit if wished, and prove what came of it."""
