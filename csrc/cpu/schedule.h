// Who works on what and when: a function of the sizes and the number of threads only, never of timing, so that results
// are the same bit for bit on every run.
#pragma once

#include <cstdint>
#include <vector>

namespace softclip {

// A rectangle of the similarity matrix; with `triangle`, where rows and columns are the same range, only its blocks
// (I, J) with I <= J.
struct Job {
  int64_t row_begin, row_end, column_begin, column_end;
  bool triangle;
  int row_group, column_group;  // whose rows and columns they are
  // Of the blocks in the row of blocks that begins here.
  int64_t first_column(int64_t row) const { return triangle ? row : column_begin; }
};

// Of rows or of columns.
struct Range {
  int64_t begin, end;
};

// Within a round no two threads share rows or columns, so they add to row and column results without locks; a barrier
// separates rounds.
class Schedule {
 public:
  // mirrored: blocks (I, J) and (J, I) are worked on together; a job then owns both its ranges as rows and as columns.
  Schedule(int64_t rows, int64_t columns, int threads, bool mirrored);
  int rounds() const;
  std::vector<Job> jobs(int round, int thread) const;
  // Rows and columns are divided between as many groups; a job is one group's rows by one group's columns.
  int groups() const { return groups_; }
  Range rows(int group) const;
  Range columns(int group) const;
  int64_t most_rows() const;  // of a group
  int64_t most_columns() const;
  Range own_groups(int thread) const;  // of which the thread's own rows and columns consist
  // Rows and columns divided as round 0 divides them: nobody else touches a thread's before that round's end.
  Range own_rows(int thread) const;
  Range own_columns(int thread) const;

 private:
  Job between(int row_group, int column_group) const;
  const int64_t rows_, columns_;
  const int threads_;
  const bool mirrored_;
  const int groups_;
};

}  // namespace softclip
