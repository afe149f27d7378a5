"""From raw PubMed, MIMIC-IV and code files to tokenised, packed, checksummed shards."""
