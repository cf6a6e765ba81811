"""Other tools' formats: their files in, values of ours out."""
