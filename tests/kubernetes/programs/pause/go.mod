module utaforge.test/pause

go 1.26
