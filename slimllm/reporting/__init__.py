"""What a run did and what came of it: records, tables, pictures, model cards."""
