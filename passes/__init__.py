"""From colors to a smaller graph: analysis, relations, layouts, rewriting, verification."""
