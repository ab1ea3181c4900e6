"""Detection in bulk: many pictures, wherever they are, into one table, on one machine or many."""
