"""Speed, memory and exactness beside other libraries; README.md says how to run the suites and how to read them."""
