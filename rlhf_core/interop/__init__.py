"""Other tools' formats: their files are read and translated into rlhf_core's configurations."""
