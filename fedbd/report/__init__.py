"""What a person looks at: live tables, comparisons, curves, trigger pictures."""
