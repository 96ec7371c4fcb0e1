// Type of the dashboards in this folder: Grafana's types without additional keys. An unknown key is an error here, while
// Grafana ignores it, and options must be those of the panel's type.

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

/** The JSON form of a type: members of an enum are replaced by their values. */
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

/** Keys of a field that an override can set. */
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

/** A value mapping as in the schema, but with typed options. */
interface ValueMap {
  type: 'value';
  options: Record<string, { text?: string; color?: string; icon?: string; index?: number }>;
}

/** The used types of panels. */
type Shown =
  | Panel<'timeseries', TimeSeries.Options, TimeSeries.FieldConfig>
  | Panel<'stat', Stat.Options, Record<string, never>>
  | Panel<'heatmap', Heatmap.Options, Heatmap.FieldConfig>
  | Panel<'state-timeline', StateTimeline.Options, StateTimeline.FieldConfig>;

type Row = Plain<Omit<RowPanel, 'panels' | 'type'>> & { type: 'row'; panels: Shown[] };

/** A variable. `definition` and a query that is an object are specific to Prometheus and missing in the schema. */
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
