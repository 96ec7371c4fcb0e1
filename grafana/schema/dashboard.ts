// What a dashboard of this folder may be: Grafana's types, closed. A key that they do not have is an error, where
// Grafana itself would ignore it, and options are those of the panel's own type.

import type {
  AnnotationQuery,
  Dashboard as AnyDashboard,
  DataSourceRef,
  FieldConfig,
  Panel as AnyPanel,
  RowPanel,
  VariableModel,
} from '@grafana/schema';
import type * as Heatmap from '@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen.d.ts';
import type * as Stat from '@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts';
import type * as StateTimeline from '@grafana/schema/dist/types/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen.d.ts';
import type * as TimeSeries from '@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts';

/** A type as JSON writes it: the members of an enum are their values. */
type Plain<T> = unknown extends T
  ? unknown
  : T extends string
    ? `${T}`
    : T extends number
      ? `${T}` extends `${infer N extends number}`
        ? N
        : number
      : T extends boolean | null | undefined
        ? T
        : T extends Array<infer Item>
          ? Array<Plain<Item>>
          : { [Key in keyof T]: Plain<T[Key]> };

type Source = { type: 'prometheus'; uid: '${datasource}' } & DataSourceRef;

/** A query of the Prometheus data source, for which the schema has no type. */
interface Target {
  refId: string;
  datasource: Source;
  expr: string;
  legendFormat: string;
  editorMode: 'code';
  range?: true;
  instant?: true;
  format?: 'heatmap';
}

/** Keys of a field that an override may set. */
type Overridden = 'color' | 'unit' | 'decimals' | 'min' | 'max' | 'displayName' | `custom.${string}`;

type Panel<Type extends string, Options, Custom> = Plain<
  Omit<AnyPanel, 'type' | 'title' | 'description' | 'datasource' | 'options' | 'fieldConfig' | 'targets' | 'gridPos' | 'id'>
> & {
  type: Type;
  id: number;
  title: string;
  description: string;
  datasource: Source;
  gridPos: { h: number; w: number; x: number; y: number };
  options: Plain<Options>;
  targets: Target[];
  fieldConfig: {
    defaults: Plain<Omit<FieldConfig, 'custom' | 'mappings'>> & { custom?: Plain<Custom>; mappings?: ValueMap[] };
    overrides: Array<{ matcher: { id: 'byName'; options: string }; properties: Array<{ id: Overridden; value: unknown }> }>;
  };
};

/** As the schema has it, but with an object's values told apart. */
interface ValueMap {
  type: 'value';
  options: Record<string, { text?: string; color?: string; icon?: string; index?: number }>;
}

/** The types of panels that are used; another one is a further line. */
type Shown =
  | Panel<'timeseries', TimeSeries.Options, TimeSeries.FieldConfig>
  | Panel<'stat', Stat.Options, Record<string, never>>
  | Panel<'heatmap', Heatmap.Options, Heatmap.FieldConfig>
  | Panel<'state-timeline', StateTimeline.Options, StateTimeline.FieldConfig>;

type Row = Plain<Omit<RowPanel, 'panels' | 'type'>> & { type: 'row'; panels: Shown[] };

/** `definition` and a query that is an object are Prometheus', and not in the schema. */
type Variable = Plain<Omit<VariableModel, 'query' | 'datasource'>> & {
  datasource?: Source;
  query: string | { query: string; refId: string; qryType: number };
  definition?: string;
};

/** A Prometheus annotation. */
type Annotation = Plain<Omit<AnnotationQuery, 'datasource'>> & {
  datasource: Source;
  expr: string;
  titleFormat: string;
  textFormat: string;
};

export type Dashboard = Plain<Omit<AnyDashboard, 'panels' | 'templating' | 'annotations'>> & {
  uid: string;
  title: string;
  description: string;
  tags: string[];
  panels: Array<Shown | Row>;
  templating: { list: Variable[] };
  annotations: { list: Annotation[] };
};
