"""Detection in bulk: many pictures, from wherever they are, into one table, on one machine or many."""
